"""The notebook's folder and the machine's, kept alike in both directions.

``tree`` knows what lies in a folder, ``merge`` decides by the last common state what has to move,
``transfer`` moves it, and ``workspace`` puts them together on the notebook's side. Paths are
bytes, relative to the folder, with slashes: as the file system has them.
"""
