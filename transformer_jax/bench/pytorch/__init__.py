"""The script of the PyTorch peers, alone in its folder: Python puts the folder of a script before its own library."""
