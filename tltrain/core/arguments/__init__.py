"""The command lines of `tltrain train`, `plan`, `preview` and `sweep`: parsing and help. Without torch."""
