"""What a bulk job reads: folders, archives, tables, videos."""
