"""Programs: fields traced, written as C++, compiled, and called with a whole solve."""
