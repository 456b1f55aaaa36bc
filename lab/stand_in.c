/* Preloaded into a lab host's sanlock and wdmd, which expect a machine of their own.

   A lab runs without CAP_SYS_RESOURCE, real-time priority and locked memory: what asks for them is told that it has
   them. And its watchdog is a FIFO to a supervisor outside (lab/watchdog.py), which knows no ioctl: a pet is a byte. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/watchdog.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static int timeout = 60;

int setrlimit(__rlimit_resource_t resource, const struct rlimit *limits) { return 0; }

int mlockall(int flags) { return 0; }

int ioctl(int fd, unsigned long request, ...)
{
	struct stat status;
	va_list rest;
	int (*real)(int, unsigned long, void *) = dlsym(RTLD_NEXT, "ioctl");

	va_start(rest, request);
	void *argument = va_arg(rest, void *);
	va_end(rest);
	if (fstat(fd, &status) || !S_ISFIFO(status.st_mode))
		return real(fd, request, argument);
	switch (request) {
	case WDIOC_GETTIMEOUT:
		*(int *)argument = timeout;
		return 0;
	case WDIOC_SETTIMEOUT:
		timeout = *(int *)argument;
		return 0;
	case WDIOC_KEEPALIVE:
		return write(fd, "k", 1) == 1 ? 0 : -1;
	}
	return real(fd, request, argument);
}
