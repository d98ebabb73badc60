"""What the engine computes with: one folder for each kind of device."""
