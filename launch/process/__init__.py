"""What a process is, what it may know, and how it ends."""
