"""What puts Penstock on a server: files, and nothing to import."""
