"""What the front end and a worker say to each other."""
