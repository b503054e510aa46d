"""The programs that start processes on hosts."""
