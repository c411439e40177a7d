"""Choose training data skill by skill while data sets arrive one after another, and keep the pool from growing."""
