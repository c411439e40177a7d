"""The trust room: which predictions can be trusted."""
