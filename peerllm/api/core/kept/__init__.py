"""Answers that outlive their connection: kept for whoever shows their key, gone on with by another device."""
