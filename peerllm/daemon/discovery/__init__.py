"""How devices find each other by mDNS. All that is heard is untrusted until TLS says who speaks."""
