"""Identity, pairing, roster, mutual TLS, frames and links. Knows nothing of models or plans; never imports torch."""
