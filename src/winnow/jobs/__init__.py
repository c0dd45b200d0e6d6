"""How a job starts, in a fork or an interpreter, and that it runs the code that it was planned with."""
