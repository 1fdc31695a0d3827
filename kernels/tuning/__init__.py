"""How tiles are searched, checked, compared and kept. Nothing here is needed to run a kernel."""
