"""What the owner of this device allows: kept, watched over, and acted on."""
