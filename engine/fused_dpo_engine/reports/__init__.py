"""What people look at: tables and pictures of results that are there already."""
