"""Messages, answers and AMQP bodies as text: no socket, no greenlet, no clock."""
