"""What blocks cost: seconds, FLOPs, memory."""
