"""Quality and speed, always next to full depth, and the result document."""
