"""What every request and response passes through, whatever its route."""
