"""What training runs say: quality experiments that take minutes to hours, each a command that can
be repeated.
"""
