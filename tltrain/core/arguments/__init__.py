"""The words behind `tltrain train`, `plan`, `preview` and `sweep`: what is understood, and the help that says so. Without torch."""
