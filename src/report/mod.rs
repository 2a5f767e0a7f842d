//! The one outcome of one series, and how it leaves: JSON, journal, wire.
