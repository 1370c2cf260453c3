"""What several test files need. Test files import from here, and never from each other."""
