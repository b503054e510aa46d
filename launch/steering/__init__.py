"""What decides the budget of served requests, and what tells that their routing has moved."""
