"What a shell starts in the background ignores SIGINT, and so would every process that a test starts and interrupts"
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
