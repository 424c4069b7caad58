"""What a command does, one file a command; the command line only parses and prints."""
