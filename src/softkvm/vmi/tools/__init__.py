"""What one does with a guest that one can look into: each tool gives typed records, and leaves it to others to show them."""
