//! TOML fragments to settings.
