"""What a user may set, how it is read and checked, and what tells two jobs apart."""
