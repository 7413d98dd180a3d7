"""pycnf."""
