"""The addresses that the specification names, as thin files over `nopad`."""
