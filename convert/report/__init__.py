"""What was measured. The JSON report is the source; HTML, Markdown and JUnit are views of it."""
