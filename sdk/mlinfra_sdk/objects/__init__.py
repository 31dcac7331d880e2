"""Objects across processes: content-addressed chunks, mapped memory, pickling."""
