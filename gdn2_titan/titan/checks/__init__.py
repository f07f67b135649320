"""What is refused before anything is built: command lines and TOML files, and settings that cannot train."""
