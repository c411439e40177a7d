"""Small data sets and networks that reproductions and tests share: offline, and the same for the same seed.

Use the modules as they are, such as ``from salience.reproductions.worlds import canvas, digits``. The data
sets need no torch; ``nets`` and ``zoo`` do.
"""
