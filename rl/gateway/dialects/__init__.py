"""Four APIs over one core. Each module reads a request, and writes the answer and the errors."""
