"""The prototypes room: which examples a decision rests on."""
