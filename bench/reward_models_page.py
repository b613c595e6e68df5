def write_page(*a, **k): return 0
