"""What commands show: results, progress and errors."""
