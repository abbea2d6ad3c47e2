"""The same work in several libraries, one file each: what `nnx bench --against` compares.

Each file imports its library, NumPy and nothing else, so that it runs in a Python without nnx, and
has the same functions. Each makes what it needs and returns a call that does the work once:

    step(sizes, x, t, optimizer, lr)      forward, loss, backward and update on one batch
    predict(sizes, x)                     class scores of a NumPy array, as a NumPy array
    products(sizes, x, backward=True)     the matrix products of a step or prediction alone
    softmax_nll(logits, labels)           the loss of raw scores, and its gradient
    adam(values, gradient, lr)            one update of a flat vector
    epoch(sizes, batch, lr, x, t)         an epoch, and a function that classifies samples

Networks have ReLU between their layers and softmax-NLL behind them; one of a single output is for
AND as textbooks have it, with tanh and squared error. A function of another library that has no
such thing is left out. `versions()` says what is measured, `limit(threads)` how many threads it may
take where the environment doesn't say it, and `wait(result)` comes back when a call is done.
"""
