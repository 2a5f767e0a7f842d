//! Every byte in or out: Unix socket, serial line, TCP, and a pair in memory that is stricter than reality.
