"""Chat templates, and conversations in the form that templates expect."""
