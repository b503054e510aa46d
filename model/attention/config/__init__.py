"""What each attention can be asked for, and which requests contradict themselves or the model:
a file a record. Imports no torch.
"""
