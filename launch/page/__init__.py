"""What our pages of HTML share: their look, their script's helpers, how they are filled."""
