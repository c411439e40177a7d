"""Instance selection by graph attention: a similarity graph that costs little, attention learnt on it, a choice."""
