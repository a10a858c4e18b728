/* Reading a mapped file raises SIGBUS when the device cannot deliver a page or the file became shorter.
 * eb_guarded() runs a function that only reads; a SIGBUS inside it ends the function with -1 instead of the process. */
#ifndef EDGEBROKER_GUARD_H
#define EDGEBROKER_GUARD_H
#include <setjmp.h>
#include <signal.h>
#include <string.h>

static __thread sigjmp_buf eb_guard_jump;
static __thread volatile sig_atomic_t eb_guard_active;
static struct sigaction eb_guard_previous;
static int eb_guard_installed;

static void eb_guard_handler(int number, siginfo_t *info, void *context)
{
    if (eb_guard_active) {
        eb_guard_active = 0;
        siglongjmp(eb_guard_jump, 1);
    }
    if (eb_guard_previous.sa_flags & SA_SIGINFO)
        eb_guard_previous.sa_sigaction(number, info, context);
    else if (eb_guard_previous.sa_handler != SIG_DFL && eb_guard_previous.sa_handler != SIG_IGN)
        eb_guard_previous.sa_handler(number);
    else {
        signal(number, SIG_DFL); /* not ours: die as without the guard, with the faulting address in the core */
    }
}

static int eb_guard_install(void)
{
    struct sigaction action;
    if (eb_guard_installed)
        return 0;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = eb_guard_handler;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    if (sigaction(SIGBUS, &action, &eb_guard_previous))
        return -1;
    eb_guard_installed = 1;
    return 0;
}

typedef int (*eb_guarded_call)(void *argument);

static int eb_guarded(eb_guarded_call call, void *argument)
{
    if (sigsetjmp(eb_guard_jump, 1))
        return -1;
    eb_guard_active = 1;
    int result = call(argument);
    eb_guard_active = 0;
    return result;
}
#endif
