"""Read a command line, check it and start the points it asks for."""
