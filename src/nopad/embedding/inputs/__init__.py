"""Inputs of a bulk job: folders, archives, tables, videos."""
