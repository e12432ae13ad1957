"""What is tried before and after training, and the doctor's findings."""
